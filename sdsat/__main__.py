"""`python -m sdsat` is the command `sdsat`."""

from sdsat.cli.main import main

if __name__ == "__main__":
    main()

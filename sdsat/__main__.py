"""`python -m sdsat` is the command `sdsat`."""

from .cli import main

if __name__ == "__main__":
    main()

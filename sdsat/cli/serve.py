"""`sdsat serve`."""

from __future__ import annotations

import errno
import socket
from typing import Annotated

from sdsat.cli.options import PLANNED, Defaults, Model, Only, TemplateOptions, from_settings
from sdsat.cli.program import check_template_options, load_decoder
from sdsat.config import DecodeConfig, HubConfig, InputError, LoadConfig, ServeConfig
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def serve(
    model: Model = embedded.NAME,
    *,
    hub: HubConfig,
    template_option: TemplateOptions = None,
    decode: Annotated[
        DecodeConfig,
        Only("k", "max_new_tokens", "strategy", "lookup"),
        Defaults(**PLANNED),
    ],
    load: LoadConfig,
    config: ServeConfig,
) -> None:
    """Answer OpenAI's requests on this machine, several at once."""
    try:
        from sdsat.interfaces.server import Server
    except ModuleNotFoundError as error:
        missing = f"serve: no package {error.name}; expected `pip install 'sdsat[serve]'` before"
        raise InputError(missing) from None
    model = at_revision(model, hub.revision)
    options = tuple(template_option or ())
    check_template_options(model, options)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:  # before weights are read; until then, clients wait
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        named = f"host={config.host}: {error}; expected an address of this machine"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            named = f"port={config.port}: {error}; expected a free one"
        raise InputError(named) from None
    decoder = load_decoder(model, load, config.batch_size * config.context)
    server = Server(decoder, decode, config, options)
    host, port = listener.getsockname()[:2]
    print(
        f"{decoder.model.name}: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True
    )
    server.serve(listener)

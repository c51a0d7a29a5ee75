"""`steerfm play`: steer from a page in the browser. `pages` draws the page, `playground` runs the steering."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from steerfm.cli.config import PlayConfig
from steerfm.cli.console import console
from steerfm.cli.playground import Playground
from steerfm.signals import Stopped
from steerfm.values import ConfigError

PORTS = range(7860, 7960)
"""Ports to try if none is given."""


def play(config: PlayConfig, command: str = "") -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: gradio is not installed. ConfigError: the port is taken, or the starting values are wrong.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError("steerfm play needs gradio: pip install 'steerfm[play]'") from None
    from steerfm.cli.pages import Visits, page, serve

    with _root(config) as root:
        playground = Playground(config, root)
        playground.warm()
        port = _port(config)
        visits = Visits()
        demo = page(playground, visits)
        address, link = serve(demo, playground, port)
        console.print(f"the playground is at {address}; Ctrl-C ends it")
        if link:
            console.print(f"and for whoever has this link at {link}")
        try:
            threading.Event().wait()
        except Stopped:
            visits.end()
            demo.close(verbose=False)
            where = f"; its run folders are in {root}" if config.out else ""
            console.print(f"the playground is closed{where}")


@contextlib.contextmanager
def _root(config: PlayConfig) -> Iterator[Path]:
    """The parent of the run folders: ``config.out``, or a temporary folder."""
    if config.out is not None:
        yield Path(config.out)
        return
    with tempfile.TemporaryDirectory(prefix="steerfm-play-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _port(config: PlayConfig) -> int:
    """Choose the port to listen at.

    Raises:
        ConfigError: it is taken, or the host is no address of this machine.
    """
    ports = PORTS if config.port is None else [config.port]
    for port in ports:
        with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"host={config.host} port={port}: {error.strerror or error}") from None
                continue
            return port
    problem = f"port={ports[0]} is taken" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are taken"
    raise ConfigError(f"{problem}: name another one, port=NUMBER, or leave it out for the first free one")

"""The command ``serve``: the page of an exported student, from this machine."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mclip.config import ConfigError, require
from mclip.files import cache_dir, missing_folder


class PageHandler(SimpleHTTPRequestHandler):
    """Files of one folder, with the headers that threads in WebAssembly need."""

    def end_headers(self) -> None:
        """Add isolation, and let the browser ask each time whether a file has changed."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file; a browser that has closed the page no longer wants it."""
        with suppress(ConnectionError):
            super().copyfile(source, outputfile)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of files that were found."""


def certificate(host: str) -> Path:
    """A key and a certificate for ``host`` that nobody else has signed, in one file of the cache, made by OpenSSL."""
    openssl = shutil.which("openssl")
    require(openssl is not None, "https", True, "the program openssl makes the certificate; install it")
    folder = cache_dir() / "certificates" / host
    with missing_folder(folder) as new:
        if new is not None:
            kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "365"]
            names = ["-subj", "/CN=mclip", "-addext", f"subjectAltName={'IP' if host[0].isdigit() else 'DNS'}:{host}"]
            files = ["-keyout", str(new / "both.pem"), "-out", str(new / "certificate.pem")]
            subprocess.run([str(openssl), "req", *kind, *names, *files], check=True, capture_output=True)
            with (new / "both.pem").open("a") as both:
                both.write((new / "certificate.pem").read_text())
    return folder / "both.pem"


def page_server(out_dir: str, host: str = "127.0.0.1", port: int = 8000, https: bool = False) -> ThreadingHTTPServer:
    """A server of the page in ``out_dir``, which listens and does not answer yet; port 0 takes a free one.

    Raises: ConfigError for a folder without a page, or a host and port where nothing can listen.
    """
    folder = Path(out_dir).expanduser() / "web"
    remedy = "no page is there; write one with python -m mclip export --web --out_dir"
    require((folder / "index.html").is_file(), "out_dir", out_dir, remedy)
    try:
        server = ThreadingHTTPServer((host, port), partial(PageHandler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port}: nothing can listen there ({error}); choose another --port.") from error
    if https:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate(host))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def serve(out_dir: str = "runs/phone", host: str = "127.0.0.1", port: int = 8000, https: bool = False) -> None:
    """Serve the page of an exported student until Ctrl-C.

    Args:
        out_dir: a folder that export --web wrote.
        host: the address to listen at; this machine alone, or for a phone the address of this machine in its network.
        port: where to listen.
        https: with a certificate that this machine signs itself; without it a phone gives the page no camera.
    """
    with page_server(out_dir, host, port, https) as server:
        print(f"http{'s' * https}://{host}:{server.server_address[1]}/ shows the page; Ctrl-C ends it", flush=True)
        server.serve_forever()

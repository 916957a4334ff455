"""The page that runs an exported student in a browser: ``web/`` in the exported folder, and the command ``serve``.

Any static host serves it as well. The page's own files lie in ``mclip/deploy/web``. ONNX Runtime (MIT licence) and the
tokenizers library (Apache 2.0) come from npm in the versions of its lock file. They are fetched once and kept in the
cache.
"""

import base64
import gzip
import json
import shutil
import ssl
import subprocess
from contextlib import suppress
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mclip.config import ConfigError, require
from mclip.deploy.reader import GOLDEN, GRAPHS, MANIFEST, PREPROCESS, TOKENIZER, DeployError
from mclip.files import atomic_folder, cache_dir, content_key, file_hash, missing_folder, read_json

PAGE = Path(__file__).with_name("web")
LOCKED = ("package.json", "package-lock.json")
WORKER = "sw.js"
LIBRARIES: dict[str, list[str]] = read_json(Path(__file__).with_name("libraries.json"))
"""By folder of the page, files of the npm packages. A browser loads those of WebGPU only when asked to."""

NATIVE = Path(onnxruntime.__file__).parent
"""ONNX Runtime for Python. Its package carries the licence and notices that the one of npm leaves out."""


def libraries() -> Path:
    """The folder of the npm packages that the lock file names, from the cache or fetched.

    Raises: DeployError where there is no npm, or where it cannot fetch them.
    """
    folder = cache_dir() / "npm" / content_key(*((PAGE / name).read_text() for name in LOCKED))
    with missing_folder(folder) as new:
        if new is None:
            return folder / "node_modules"
        npm = shutil.which("npm")
        if npm is None:
            remedy = "install Node.js, which is needed once, to fetch the libraries of the page"
            raise DeployError(f"npm: not found; {remedy}, or export without --web.")
        for name in LOCKED:
            shutil.copy(PAGE / name, new)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        told = subprocess.run(command, cwd=new, capture_output=True, text=True)
        if told.returncode:
            raise DeployError(f"npm ci: the libraries of the page could not be fetched ({told.stderr.strip()[-400:]}).")
    return folder / "node_modules"


def golden_json(folder: Path) -> dict[str, Any]:
    """The examples of ``golden.npz`` as JSON: files and prepared levels (S, S, 3) in base 64, tokens, embeddings."""
    settings = read_json(folder / PREPROCESS)
    with np.load(folder / GOLDEN, allow_pickle=False) as golden:
        prepared = golden["prepared"].astype(np.float32).transpose(0, 2, 3, 1)
        levels = np.rint((prepared * settings["std"] + settings["mean"]) * 255).astype(np.uint8)
        pictures = []
        for name, own, embedding in zip(golden["pictures"], levels, golden["image_embeddings"], strict=True):
            file, own = (base64.b64encode(content.tobytes()).decode() for content in (golden[name], own))
            pictures.append({"name": name, "file": file, "levels": own, "embedding": embedding.tolist()})
        rows = zip(golden["texts"], golden["tokens"], golden["text_embeddings"], strict=True)
        texts = [{"text": str(text), "tokens": ids.tolist(), "embedding": own.tolist()} for text, ids, own in rows]
    return {"pictures": pictures, "texts": texts}


def write_web(folder: str | Path) -> dict[str, int]:
    """Write ``web/`` into an exported ``folder``, whole or not at all.

    Returns: bytes by part of the page: page, model (int8), float32, and vendor, which is what npm gave.

    Raises: DeployError for a folder without int8 graphs, or as :func:`libraries`.
    """
    folder = Path(folder).expanduser()
    if "int8" not in read_json(folder / MANIFEST)["forms"]:
        raise DeployError(f"{folder}: the page starts with the int8 graphs, which are not there; export with int8.")
    packages = libraries()
    with atomic_folder(folder / "web") as new:
        shutil.copytree(PAGE, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LOCKED))
        parts = {"model": (*GRAPHS["int8"], PREPROCESS, MANIFEST), "float32": GRAPHS["float32"]} | LIBRARIES
        for part, names in parts.items():
            (new / part).mkdir()
            for name in names:
                shutil.copy((packages if part in LIBRARIES else folder) / name, new / part)
        shutil.copy(packages / "@huggingface/tokenizers/LICENSE", new / "vendor" / "tokenizers-licence.txt")
        shutil.copy(NATIVE / "LICENSE", new / "vendor" / "onnxruntime-licence.txt")
        shutil.copy(NATIVE / "ThirdPartyNotices.txt", new / "vendor" / "onnxruntime-notices.txt")
        packed = {TOKENIZER: (folder / TOKENIZER).read_bytes(), "golden.json": json.dumps(golden_json(folder)).encode()}
        for name, content in packed.items():
            (new / "model" / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        paths = {path.relative_to(new).as_posix(): path for path in sorted(new.rglob("*")) if path.is_file()}
        hashes = {name: file_hash(path)[path.name] for name, path in paths.items() if name != WORKER}
        (new / WORKER).write_text(f"const FILES = {json.dumps(hashes)};\n{(PAGE / WORKER).read_text()}")
        sizes = dict.fromkeys(("page", "model", "float32", "vendor"), 0)
        for name, path in paths.items():
            part = name.split("/")[0]
            sizes[part if part in sizes else "page"] += path.stat().st_size
    return sizes


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
    folder = cache_dir() / "certificates" / f"{host}-{date.today().year}"  # it holds for a year from its first day
    with missing_folder(folder) as new:
        if new is not None:
            kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "366"]
            names = ["-subj", "/CN=mclip", "-addext", f"subjectAltName={'IP' if host[0].isdigit() else 'DNS'}:{host}"]
            files = ["-keyout", str(new / "both.pem"), "-out", str(new / "both.pem")]  # the second adds to the first
            subprocess.run([str(openssl), "req", *kind, *names, *files], check=True, capture_output=True)
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
        # Each handshake is left to the thread of its connection: a silent client must not hold up the others.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
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

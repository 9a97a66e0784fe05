"""moto's S3 server with atomic conditional puts, as S3's are.

moto looks for a key and then stores it without a lock, so that two requests at once may both find
none.
"""

import threading
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

_app = DomainDispatcherApplication(create_backend_app)
_lock = threading.Lock()


def app(environ: dict[str, Any], start_response: Any) -> Any:
    """Answer a request; those with a condition one at a time."""
    if "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ:
        with _lock:
            return _app(environ, start_response)
    return _app(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)

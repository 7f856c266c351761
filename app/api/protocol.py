"""HTTP/1.1 by httptools, whose refusals are problems too."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.problems import MEDIA_TYPE, bad_request


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; what it can not read as HTTP reaches no route, and is refused here."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, and close the connection."""
        body = bad_request(msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            f"content-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

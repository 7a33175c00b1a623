"""Shakes hands on the ports of a SuperLink with the certificate in /secrets, even an expired one, and does nothing else."""

import ssl
import threading
from socket import create_server


def serve(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/secrets/server.crt", "/secrets/server.key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    listening = create_server(("", port))
    while True:
        connection, _ = listening.accept()
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            continue


if __name__ == "__main__":
    for port in (8000, 9092):
        threading.Thread(target=serve, args=(port,)).start()

"""Error messages for untrusted server certificates, shared by devices and the server's own processes."""

import ssl
from pathlib import Path


def distrust(server: str, error: ssl.SSLCertVerificationError, ca: Path) -> str:
    """Return one sentence that says why a server's certificate is not trusted.

    `server`: "HOST:PORT"; `ca`: file of the CA that should vouch for it.
    """
    reason = error.verify_message
    if "expired" in reason:
        return f"the certificate of {server} has expired: renew it there with `quickbloom secrets --renew-server`"
    if "not yet valid" in reason:
        return f"the certificate of {server} is not valid yet: set this machine's clock"
    if "match" in reason:  # hostname mismatch, IP address mismatch
        mend = "renew it there with `quickbloom secrets --renew-server --host NAME`"
        return f"the certificate of {server} is for other names: {mend}"
    return f"the certificate of {server} was not made by the CA in '{ca}' ({reason}): copy this federation's ca.crt here"

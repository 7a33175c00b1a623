"""What is wrong with the certificate of a server, in words; devices and the server's own processes say it alike."""

import ssl
from pathlib import Path


def distrust(server: str, error: ssl.SSLCertVerificationError, ca: Path) -> str:
    """One sentence on why the certificate of `server` ("HOST:PORT") is not trusted by the CA in the file `ca`."""
    reason = error.verify_message
    if "expired" in reason:
        return f"the certificate of {server} has expired: renew it there with `quickbloom secrets --renew-server`"
    if "not yet valid" in reason:
        return f"the certificate of {server} is not valid yet: set this machine's clock"
    if "match" in reason:  # hostname mismatch, IP address mismatch
        mend = "renew it there with `quickbloom secrets --renew-server --host NAME`"
        return f"the certificate of {server} is for other names: {mend}"
    return f"the certificate of {server} was not made by the CA in '{ca}' ({reason}): copy this federation's ca.crt here"

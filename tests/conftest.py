"""What all tests share."""

import signal


def pytest_configure() -> None:
    """Let Ctrl-C reach tests that send it: a shell that starts the suite in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

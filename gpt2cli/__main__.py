"""`python -m gpt2cli` and the `gpt2` script."""

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `stop.listen`
    from gpt2cli.commands import app

    app.main()


if __name__ == "__main__":
    main()

"""The command, from its first moment on: Ctrl-C ends it in one line while Python still imports what it needs."""

import sys


def main() -> None:
    try:
        from .cli import main as command_line
    except KeyboardInterrupt:
        print("cifar-resnet: interrupted", file=sys.stderr)
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()

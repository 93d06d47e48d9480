"""`python -m heterolora.bench`, the same as `heterolora bench`."""

import argparse
import sys

from heterolora.bench import cli
from heterolora.errors import HeteroLoraError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m heterolora.bench",
        description="Measure heterolora against its peers; no speed on a red parity check.",
        epilog=cli.EPILOG.replace("heterolora bench", "python -m heterolora.bench"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_arguments(parser)
    try:
        return cli.run(parser.parse_args())
    except HeteroLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

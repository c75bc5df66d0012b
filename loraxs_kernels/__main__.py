"""``python -m loraxs_kernels info | demo | svd-report | convert``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m loraxs_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built, what runs here, which backend a call gets")
    commands.add_parser("demo", help="fine-tune MiniLM on movie-review snippets", add_help=False)
    commands.add_parser(
        "svd-report", help="singular value spectra of a model's layers", add_help=False
    )
    commands.add_parser("convert", help="trained cores of one library for another", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command == "demo":
        from loraxs_kernels import demo

        return demo.main(rest)
    if options.command == "svd-report":
        from loraxs_kernels import svd_report

        return svd_report.main(rest)
    if options.command == "convert":
        from loraxs_kernels.interop import convert

        return convert.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from loraxs_kernels import info

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())

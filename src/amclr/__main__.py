"""`python -m amclr` is `amclr`."""

from amclr.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

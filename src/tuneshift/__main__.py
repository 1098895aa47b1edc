"""`python -m tuneshift` is `tuneshift`."""

from tuneshift.cli import main

if __name__ == "__main__":
    main()

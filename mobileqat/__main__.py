"""`python -m mobileqat`."""

from mobileqat.cli import main

if __name__ == "__main__":
    main()

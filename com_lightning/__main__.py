"""``python -m com_lightning``."""

from com_lightning.cli import main

if __name__ == "__main__":
    main()

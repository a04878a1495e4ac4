"""``python -m com_lightning``."""

from com_lightning.main import main

if __name__ == "__main__":
    main()

"""``python -m lm_ortho`` is ``lm-ortho``, for where no console script was installed."""

from lm_ortho.cli import main

if __name__ == "__main__":
    main()

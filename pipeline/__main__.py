"""`python -m pipeline` is `longtail`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()

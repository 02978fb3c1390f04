"""What `python -m mergelab.cli` runs."""

from mergelab.cli import main

if __name__ == "__main__":
    main()

"""python -m genai_fast."""

from genai_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

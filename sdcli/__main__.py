"""`python -m sdcli`, which is also what `accelerate launch -m sdcli` runs."""

from sdcli.cli.app import main

if __name__ == "__main__":
    main()

"""The datasets of `flatops train`, a file each; `--data` takes the names that they register."""

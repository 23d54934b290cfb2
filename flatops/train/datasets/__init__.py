"""The datasets of `flatops train`, one file each; `--data` takes the names that they register."""

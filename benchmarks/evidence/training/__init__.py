"""Which trainings are run, and how one is run."""

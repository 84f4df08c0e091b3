"""The cohort before training, for the data owner: what is wrong with it, and what to leave out. Nothing of it leaves the site."""

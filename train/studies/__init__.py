"""Studies: the same training in several arms and over several seeds, run one after another, compared seed by seed."""

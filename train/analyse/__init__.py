"""``nest-fn analyse``: a model and utterances, what is found in them, and how it is written and drawn."""

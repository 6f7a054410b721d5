"""Corpora in other forms as manifests: lhotse's cuts, Parquet files, folders of Hugging Face datasets."""

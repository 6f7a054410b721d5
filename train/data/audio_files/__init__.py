"""Audio files: WAV, all other formats through soundfile, a part of a file as int16 mono at a given rate."""

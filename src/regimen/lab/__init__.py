"""The laboratory: arms and seeds, statistics over them, verdicts, reports. Nothing here trains by itself."""

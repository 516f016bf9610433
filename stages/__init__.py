"""The pipeline's doors: one file a stage, files in, files out, no arithmetic. Nobody imports this room."""

"""The run folder: configuration, numbers, samples, pictures and a report page.

    config.yaml  result.json  metrics.jsonl  samples.safetensors  grid.png  trace.png  report.html

The functions take only tensors, dictionaries and strings, so any code can write a run folder. Figures are built without
pyplot: no backend is chosen and no global style changes.

`run_folder` stores files, `pictures` draws grids, `plots` draws curves, `page` writes report.html, and `card` writes a
model's README.md.
"""

"""What a run leaves behind: one folder with its configuration, numbers, samples, pictures and a page to look at.

    config.yaml  result.json  metrics.jsonl  samples.safetensors  grid.png  trace.png  report.html

Takes tensors, dictionaries and strings only, so that anything can write a run folder. Figures are built without pyplot:
no backend is chosen and no global style is touched.

`run_folder` keeps files, `pictures` draws grids, `plots` lines, `page` writes report.html and `card` a model's README.md.
"""

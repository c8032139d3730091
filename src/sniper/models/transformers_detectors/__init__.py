"""The detectors of transformers that match queries, trained on chips with SNIPER's labels.

`hub` finds a detector by name, `config` reads its architecture, `families` lists what differs between architectures,
`losses` adds SNIPER's labels to their losses, `adapter` and `build` make the detector, `weights` loads trained ones.
"""

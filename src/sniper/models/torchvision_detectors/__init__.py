"""The detectors of torchvision, trained on chips with SNIPER's labels.

`build` makes one by name, `weights` loads torchvision's own. `adapter` is what all have in common, `one_stage` has
FCOS, RetinaNet and SSD, `rcnn` has Faster R-CNN and the boxes of Mask R-CNN.
"""

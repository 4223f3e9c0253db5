"""Pretrained text models as backbones, and the item catalogue."""

"""Pretrained text models as backbones, and what is known of the items."""

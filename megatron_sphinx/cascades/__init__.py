"""A model's boxes handed on to other programs: segmentation, inpainting, dense captions, videos by single frames."""

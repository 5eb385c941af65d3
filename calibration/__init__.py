"""Fine-tune a merged network with the originals as teachers; the only part of the tool that imports torch."""

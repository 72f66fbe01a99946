"""Any image-text model of transformers that no other family knows: parts by introspection, chat by its own template."""

"""What goes to the Hugging Face hub: a bundle or a folder for transformers.js, with its model card."""

"""The operations that REST, the Gradio API and the page share, and their store. Never imports torch."""

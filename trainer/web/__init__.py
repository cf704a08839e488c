"""REST, the Gradio API, MCP and the page. Never imports torch."""

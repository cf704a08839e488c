"""The verbs that REST, the Gradio API and the page share, and the store behind them. Never imports torch."""

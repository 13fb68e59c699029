"""The retrieval server: a retriever behind Search-R1's HTTP protocol, with limits.

`app.py` is the web application, `batching.py` the one thread that searches, `bodies.py` what goes over the wire and
`process.py` the server process. Importing this package needs nothing beyond the core; `app.py` needs the extra `serve`.
"""

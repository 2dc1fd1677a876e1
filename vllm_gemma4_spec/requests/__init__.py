"""What a request asks for holds at every position of a speculative step."""

"""One file per model family: a diffusers transformer seen as `embed -> blocks -> head` over tokens."""

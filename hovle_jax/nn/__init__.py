"""The networks: attention, layers, the holistic embedding, the decoder, the teacher."""

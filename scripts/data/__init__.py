"""What the data scripts share: downloading, unpacking, converting masks, and a parallel map."""

"""What the data scripts share: fetching, unpacking, masks on their way into a data set, and a map over processes."""

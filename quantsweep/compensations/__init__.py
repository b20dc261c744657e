"""What is stored beside the codes to make up for their error, one module each (`COMPENSATION`)."""
